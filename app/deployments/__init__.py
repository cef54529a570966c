"""What should run and what does: deployments, revisions, endpoints, replicas and builds."""
