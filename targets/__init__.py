"""Hardware facts as tables, toolchains, schedules."""
