"""Times, operations and limits: what stands behind hone.profile."""
