"""What a model's forward does: its graph, its calls, and who reads what."""
