"""What eval.py asks and how it scores: held-out questions, attention, published benchmarks, replies."""
