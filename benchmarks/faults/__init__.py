"""The fault laboratory: how often an alarm is right."""
