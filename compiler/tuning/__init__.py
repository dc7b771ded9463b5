"""The search, its processes and its records: what stands behind hone.tune and hone.database."""
