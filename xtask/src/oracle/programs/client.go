// A client on net/http: `client keep-alive|close URL REQUESTS CONCURRENCY`.
package main

import (
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"sync"
)

func main() {
	requests, _ := strconv.Atoi(os.Args[3])
	concurrency, _ := strconv.Atoi(os.Args[4])
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives:   os.Args[1] == "close",
		MaxIdleConnsPerHost: concurrency,
	}}
	var workers sync.WaitGroup
	for i := 0; i < concurrency; i++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for j := 0; j < requests/concurrency; j++ {
				response, err := client.Get(os.Args[2])
				if err != nil {
					log.Print(err)
					continue
				}
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
		}()
	}
	workers.Wait()
	client.CloseIdleConnections()
}
