"""The job, stage by stage: the only room that knows Job, store and stages."""
