"""Instructions that fixed lookups on a CPU take, beside committed figures: no clock is involved."""
