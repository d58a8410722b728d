"""What every run needs: options, files, a run's folder, processes, devices, images. No file here knows an algorithm."""
