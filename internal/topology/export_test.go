package topology

// WritePart writes a share in percent.
var WritePart = writePart
