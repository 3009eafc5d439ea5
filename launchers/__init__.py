"""Launchers: where a job runs. One module each; ``base.LAUNCHERS`` names them."""
