"""The tiny world: images of shapes that a CPU can learn to draw in minutes, with an exact reader."""
