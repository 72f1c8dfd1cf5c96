"""Number formats of few bits, and how their codes are packed into bytes."""
