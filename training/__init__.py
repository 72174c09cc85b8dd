"""What the training loop uses: settings, the run folder, guards, pictures."""
