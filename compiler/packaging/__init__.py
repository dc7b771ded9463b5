"""The file format and the loaded library: what stands behind hone.package and hone.runtime."""
