"""What a model uses each parameter for, by data flow (for optimizer roles). Rewrites nothing."""
