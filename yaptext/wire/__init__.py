"""What stands on the wire of `/ws`: the messages, and the document that describes them."""
