"""The networks and their loss: backbones, DINO's head and loss, batch norm."""
