"""Which layout to train in: what every one of them would cost, before anything is queued. No torch."""
