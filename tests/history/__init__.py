"""What happened during a run, written down, and the one offline judge of it."""
