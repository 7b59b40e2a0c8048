"""Models and data to look at: `small` for the README, `demo` for `grace demo`."""
