"""Learning-rate schedules, one file each; found by folder scan (`megatrain.optim.schedule.SCHEDULE`)."""
