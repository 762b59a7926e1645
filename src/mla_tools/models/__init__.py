"""MLX runtimes of the models that mlx-lm has no class for, in the form of mlx-lm's own model files."""
