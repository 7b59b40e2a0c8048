"""Edits that survive a crash, and replicas that follow: one writer publishes, others read."""
