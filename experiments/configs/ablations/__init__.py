"""One file per question; `tools/run_ablation.py` runs the variations that answer it."""
