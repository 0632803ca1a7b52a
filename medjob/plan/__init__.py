"""What a training needs before it runs: sizes of models, memory of devices, settings that fit. Nothing here imports torch."""
