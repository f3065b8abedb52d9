"""What stands on the wire of `/ws`: the messages, with the document that describes them."""
