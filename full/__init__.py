"""Released models at full size: their files, their encoders of prompts, and their rewards."""
