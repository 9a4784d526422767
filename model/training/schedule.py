"""Learning-rate schedules."""


def warmup_stable_decay(step: int, num_steps: int, warmup_share: float = 0.02, decay_share: float = 0.1) -> float:
    """Returns the factor on the maximal learning rate at ``step`` (0-based): linear up, flat, then linear to near zero.

    Source: method section 7, the warmup-stable-decay schedule with a rapid decay over the last tenth.
    """
    num_warmup = max(1, round(num_steps * warmup_share))
    num_decay = max(1, round(num_steps * decay_share))
    if step < num_warmup:
        return (step + 1) / num_warmup
    if step < num_steps - num_decay:
        return 1.0
    return max(0.01, (num_steps - step) / num_decay)
