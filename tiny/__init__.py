"""The embedded world and model: scenes, architecture, build, card; its weights are in tiny/model/."""
