"""Lightning tasks, losses and export."""
