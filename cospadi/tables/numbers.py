"""Numbers as papers print them."""

from __future__ import annotations

import math


def perplexity(value: float) -> str:
    """Two decimals below 100, none below 10,000, then a power of ten.

    >>> [perplexity(value) for value in (22.551, 99.996, 249.3, 1649.0, 9999.7, float("inf"))]
    ['22.55', '100', '249', '1649', '1.0e4', 'inf']
    """
    if not math.isfinite(value):
        return str(value)
    # The limits are those of rounding: 99.996 is 100, not 100.00.
    if abs(value) < 99.995:
        return f"{value:.2f}"
    if abs(value) < 9999.5:
        return f"{value:.0f}"
    return _power_of_ten(value)


def percent(value: float) -> str:
    """A fraction in percent, one decimal.

    >>> percent(0.5764)
    '57.6'
    """
    return f"{100 * value:.1f}"


def divergence(value: float) -> str:
    """A perplexity's digits from 0.1 on, two significant digits below.

    >>> [divergence(value) for value in (1.234, 0.0712, 0.00042, 0.0)]
    ['1.23', '0.071', '4.2e-4', '0']
    """
    if value == 0:
        return "0"
    if not abs(value) < 0.0995:
        return perplexity(value)
    if abs(value) >= 0.00995:
        return f"{value:.3f}"
    return _power_of_ten(value)


def _power_of_ten(value: float) -> str:
    """Two significant digits, and an exponent without the sign and the zeros that Python adds.

    >>> _power_of_ten(1649.0), _power_of_ten(0.00042)
    ('1.6e3', '4.2e-4')
    """
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio(value: float) -> str:
    """A bits-removed fraction, three decimals.

    >>> ratio(0.20004)
    '0.200'
    """
    return f"{value:.3f}"


def points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign.

    >>> points(-0.0123), points(0.02)
    ('−1.2', '+2.0')
    """
    return f"{100 * value:+.1f}".replace("-", "−")


def nats(value: float) -> str:
    """A difference of log-likelihoods, with its sign.

    >>> nats(-0.0123), nats(0.5)
    ('−0.012', '+0.500')
    """
    return f"{value:+.3f}".replace("-", "−")


def size(value: float) -> str:
    """Megabytes or seconds: three significant digits, at most one decimal.

    >>> [size(value) for value in (0.26, 4.13, 212.4, 3141.5)]
    ['0.3', '4.1', '212', '3142']
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
