// SPDX-License-Identifier: Apache-2.0

package record

import (
	"errors"
	"fmt"
)

// State is a frozen Layer. It holds the current traffic secrets: whoever keeps
// it overwrites them (Wipe). The zero State is a Layer that had ended.
type State struct {
	Suite  uint16
	Client bool
	Read   Direction
	Write  Direction

	Useless     int    // records since the last application data
	Message     []byte // the beginning of a split message
	MessageLeft int    // bytes of its body still to come

	Reply   bool // a KeyUpdate is owed
	Asked   bool // a KeyUpdate is awaited
	Alerted bool // our last alert has been sealed
}

// Direction is one direction's key.
type Direction struct {
	Secret   []byte // current generation
	Sequence uint64 // number of the next record under it
}

// Freeze takes the state out of the Layer, which is unusable afterwards. A Layer
// whose Open has returned an error has nothing to go on with: its State is zero,
// and Thaw refuses it.
func (l *Layer) Freeze() State {
	if l.err != nil || l.in.aead == nil || l.out.aead == nil {
		l.Close()
		return State{}
	}
	s := State{
		Suite:  l.suite.id,
		Client: l.client,
		// The secrets move: the Layer keeps no copy.
		Read:    Direction{Secret: l.in.secret, Sequence: l.in.seq},
		Write:   Direction{Secret: l.out.secret, Sequence: l.out.seq},
		Useless: l.useless,
		Reply:   l.reply,
		Asked:   l.asked,
		Alerted: l.alerted,
	}
	if l.msgHave > 0 {
		s.Message = append([]byte(nil), l.msg[:l.msgHave]...)
		s.MessageLeft = l.msgLeft
	}
	l.in.secret, l.out.secret = nil, nil
	l.Close()
	return s
}

// Thaw makes a Layer of a State, whose secrets it takes over.
func Thaw(s State) (*Layer, error) {
	if s.Suite == 0 {
		return nil, errors.New("state is of a connection that had ended")
	}
	if s.Useless < 0 || s.Useless > maxUseless {
		return nil, fmt.Errorf("state counts %d records without data, out of range", s.Useless)
	}
	if len(s.Message) > messageHeaderLen+1 || s.MessageLeft < 0 || s.MessageLeft > maxMessage {
		return nil, fmt.Errorf("state has %d bytes of a split message with %d to come, out of range", len(s.Message), s.MessageLeft)
	}
	l, err := New(Secrets{Suite: s.Suite, Client: s.Client, Read: s.Read.Secret, Write: s.Write.Secret})
	if err != nil {
		return nil, err
	}
	l.in.seq, l.out.seq = s.Read.Sequence, s.Write.Sequence
	l.useless = s.Useless
	l.msgHave = copy(l.msg[:], s.Message)
	l.msgLeft = s.MessageLeft
	l.reply, l.asked, l.alerted = s.Reply, s.Asked, s.Alerted
	return l, nil
}

// Wipe overwrites the secrets.
func (s *State) Wipe() {
	clear(s.Read.Secret)
	clear(s.Write.Secret)
}
