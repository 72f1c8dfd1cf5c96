"""Number formats of few bits, and how their codes lie in bytes."""
