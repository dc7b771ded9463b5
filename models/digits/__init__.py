"""The trained digits CNN of the demo, its calibration and evaluation data, and how it was made."""
