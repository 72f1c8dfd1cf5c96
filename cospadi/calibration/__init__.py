"""Room 2: calibration text through the dense model -> one gram per shared input."""
