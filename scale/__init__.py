"""The same cues and reward on engines that scale: TRL and EasyR1."""
