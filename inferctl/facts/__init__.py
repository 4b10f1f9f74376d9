"""What others publish, with sources: base images, hardware with its prices, drivers, and which precision runs where."""
