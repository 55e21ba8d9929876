"""Many interventions as few forwards, exactly."""
