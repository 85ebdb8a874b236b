"""A captioned toy world whose truth is known: scenes, their rendering, and a judge that reads videos back."""
