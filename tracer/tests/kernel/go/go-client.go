// The classic case, client side: DisableKeepAlives makes every request carry "Connection: close".
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	count, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	var conn net.Conn
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		var err error
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return conn, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}
	for i := 0; i < count; i++ {
		response, err := client.Get(os.Args[1])
		if err != nil {
			log.Fatal(err)
		}
		waitForFin(conn)
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
}

// waitForFin returns once the server has closed. Over a network it always has by the time that the client could; on one
// host the client could be faster.
func waitForFin(conn net.Conn) {
	const closeWait = "08"
	port := conn.LocalAddr().(*net.TCPAddr).Port
	for {
		table, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			log.Fatal(err)
		}
		for _, line := range strings.Split(string(table), "\n") {
			fields := strings.Fields(line)
			if len(fields) > 3 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) && fields[3] == closeWait {
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
}
