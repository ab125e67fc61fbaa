package main

import (
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
)

// freePorts returns the first of n consecutive ports of 127.0.0.1 that nobody uses, for TCP
// and UDP. They lie below those that the kernel gives to clients, lest a client take one
// before the server does.
func freePorts(n int) (int, error) {
	const lowest, highest = 12_000, 32_000
	for range 200 {
		first := lowest + rand.IntN(highest-lowest-n)
		free := true
		for port := first; port < first+n && free; port++ {
			free = canListen(port)
		}
		if free {
			return first, nil
		}
	}
	return 0, errors.New("no free ports were found on 127.0.0.1")
}

func canListen(port int) bool {
	l, err := net.Listen("tcp", address(port))
	if err != nil {
		return false
	}
	l.Close()
	p, err := net.ListenPacket("udp", address(port))
	if err != nil {
		return false
	}
	p.Close()
	return true
}

func address(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
