"""What `linear_eval.py` measures, one file a subject; the study itself is there."""
