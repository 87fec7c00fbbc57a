"""Fine-tuning of spiking programs: data, losses, the loop, its curve."""
