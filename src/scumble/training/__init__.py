"""Training: one loop over plans of phases. It knows steps, gradients and time, not pictures or prompts.

loop.py        THE loop
plan.py        Plan, Phase, Trainable: what to train, as values
settings.py    TrainSettings
objective.py   the denoising loss;  timesteps.py  which noise levels
optimizers.py  schedules.py  ema.py
numerics.py    precision, determinism
keeper.py      what happens between steps;  state.py  checkpoints;  proofs.py  that something trained
meter.py       steps into events;  events.py  what happened, as values;  sinks/  where it goes
interrupt.py   Ctrl-C
"""
