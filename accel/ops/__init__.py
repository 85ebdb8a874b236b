"""Pure tensor mathematics: token partition and matching, frequency bands, flow matching."""
