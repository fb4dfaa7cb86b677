"""What works, system by system: exported, run, built, timed and tracked, and the table that says so."""
