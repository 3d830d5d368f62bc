"""Names that producers and workers share."""

from producer.contract import keys


def test_the_classes_of_a_tenants_queue_are_the_tenants() -> None:
    assert keys.class_queues("gpu@acme") == ["gpu:high@acme", "gpu@acme", "gpu:low@acme"]
    assert keys.class_queues("gpu") == ["gpu:high", "gpu", "gpu:low"]
