"""DisCa: the feature cache (`disca`), the small network that predicts block outputs (`predictor`), and its manifest."""
