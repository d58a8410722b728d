"""What every run needs: options, files, processes, devices, images. No file here knows an algorithm."""
