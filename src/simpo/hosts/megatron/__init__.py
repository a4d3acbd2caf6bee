"""Preference optimization in Megatron-Core: settings, batches, and the step that its schedules call."""
