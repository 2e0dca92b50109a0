"""What a bounded load costs the tiny model in answers: grids of policies and settings."""
