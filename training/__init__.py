"""Everything around the training loop of locus_mini.py: settings, run folder, checks, memory, pictures."""
