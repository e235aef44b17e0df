"""The networks and their loss: XCiT, DINO's head and loss, batch norm."""
